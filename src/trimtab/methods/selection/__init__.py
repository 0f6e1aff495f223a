"""Methods of the kind selection: one file each, found by existing."""
