"""What comes in: packages, hub repositories, texts, checkpoints, calibration rows."""
