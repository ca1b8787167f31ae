"""What comes in: packages, the hub, texts, checkpoints, calibration rows."""
