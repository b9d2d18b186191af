"""Its presence puts this folder on the import path, so that any test can import ``routing.registry``."""
