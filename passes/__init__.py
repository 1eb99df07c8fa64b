"""The compiler passes, imported as `graphlocal.passes`: each turns one `LocalGraph` into another."""
