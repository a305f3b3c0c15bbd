"""What a run depends on, real and made to fail: object store, tracking server, disk, the network between."""
