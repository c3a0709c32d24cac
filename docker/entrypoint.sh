#!/bin/sh
# Start of every container of the benchmark image: drop root, so that what a run leaves on the host belongs to whoever cloned the project.
# Started as root (conductor, data): becomes the owner of the mounted results folder, in the worker's group, without capabilities.
# Started as another user (worker), or with KEEP_ROOT=1 (tests): stays.
set -eu

# The image's commit, unless it was given when the image was built.
if [ -z "${HARNESS_GIT_SHA:-}" ]; then HARNESS_GIT_SHA=$(cat /app/.git-sha 2>/dev/null || true); export HARNESS_GIT_SHA; fi

umask 002            # conductor and worker read each other's files in the jobs volume through the group
export HOME="${HOME_IN_CONTAINER:-/tmp/home}" USER=benchmark LOGNAME=benchmark   # the user may have no name in this image
mkdir -p "$HOME" 2>/dev/null || true

if [ "$(id -u)" != 0 ] || [ -n "${KEEP_ROOT:-}" ]; then exec "$@"; fi

owner=$(stat -c %u /app/results)
group=$(stat -c %g /app/results)
for folder in /app/data /app/data/huggingface /app/results/local; do   # folders that the engine or this script had to make are root's: hand them over
  mkdir -p "$folder"
  if [ "$(stat -c %u "$folder")" = 0 ] && [ "$owner" != 0 ]; then chown "$owner:$group" "$folder"; fi
done
chown "$owner:$group" "$HOME"
exec setpriv --reuid "$owner" --regid "$group" --groups 10001 --inh-caps=-all --bounding-set=-all --no-new-privs -- "$@"
