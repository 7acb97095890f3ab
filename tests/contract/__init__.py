"""What every registered model promises."""
