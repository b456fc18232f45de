"""Beside the method: files and flags, rewards that need detectors, tiny worlds, studies."""
