"""Methods of the kind stack: one file each, found by existing."""
