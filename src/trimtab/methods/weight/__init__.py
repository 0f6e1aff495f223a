"""Methods of the kind weight: one file each, found by existing."""
