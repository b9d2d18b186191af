"""One LightningDataModule per family of data."""
