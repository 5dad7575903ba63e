"""Readers and writers of the formats of other tools, and what tells them apart."""
