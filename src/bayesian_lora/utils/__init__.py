"""Tensor and random-number helpers that every room may use."""
