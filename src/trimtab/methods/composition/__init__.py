"""Methods of the kind composition: one file each, found by existing."""
