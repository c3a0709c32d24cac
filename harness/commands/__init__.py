"""What the verbs of the command line do. Imported only when a verb is called, so that ``harness --help`` costs nothing."""
