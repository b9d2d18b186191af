"""One file per published method; import them from :mod:`evomoe.routing`."""
