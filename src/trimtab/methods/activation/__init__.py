"""Methods of the kind activation: one file each, found by existing."""
