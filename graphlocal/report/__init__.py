"""The report of a training run: one HTML page that fetches nothing.

`sections` says what stands in it, `charts` draws, `clusters` lays out representations by t-SNE, `document` puts it all
in one file.
"""

from graphlocal.report.document import report

__all__ = ["report"]
