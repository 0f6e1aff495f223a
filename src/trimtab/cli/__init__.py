"""The command line. Commands live in `trimtab.cli.main`; they need the extra `cli`."""
