"""Do scores predict retraining? Plans, measurements, judgements, and baselines to compare with."""
