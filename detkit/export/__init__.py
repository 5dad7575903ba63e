"""Export: models as files that other programs run, and the runtime that runs them without torch.

Nothing is imported here: `detkit.export.runtime` is used where torch is not installed.
"""
