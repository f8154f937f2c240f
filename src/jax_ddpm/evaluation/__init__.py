"""Measuring models and samples: statistics as pure functions over features, and their records."""
