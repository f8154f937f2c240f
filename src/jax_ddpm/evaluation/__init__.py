"""What samples and models are worth: statistics of quality as pure functions over features."""
