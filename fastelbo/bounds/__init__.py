"""Objectives of several samples."""
