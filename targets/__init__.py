"""The compile targets, imported as `graphlocal.targets`: each makes a scheduled graph runnable."""
