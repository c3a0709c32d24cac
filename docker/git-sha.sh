#!/bin/sh
# Prints the commit: the argument, else what .git/HEAD points at; nothing where neither is known.
set -eu
if [ -n "${1:-}" ]; then echo "$1"; exit; fi
[ -f .git/HEAD ] || exit 0
head=$(cat .git/HEAD)
case $head in
  ref:*) ref=${head#ref: }
         if [ -f ".git/$ref" ]; then cat ".git/$ref"
         elif [ -f .git/packed-refs ]; then awk -v ref="$ref" '$2 == ref { print $1 }' .git/packed-refs; fi ;;
  *) echo "$head" ;;
esac
