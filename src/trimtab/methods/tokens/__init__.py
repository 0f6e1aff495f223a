"""Methods of the kind tokens: one file each, found by existing."""
