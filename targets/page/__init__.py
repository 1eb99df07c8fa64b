"""The partition page: one self-contained HTML file that shows a model as its subgraphs, error neurons and schedule.

`groups` makes the tree of regions, `layout` gives it positions, `content` says what the page knows of the graph,
`document` writes the file. `front/` holds what runs in the browser, and `vendor/` the libraries that `bundle.js`
fetches when the package is built (Cytoscape.js, which draws, and dagre, which lays out opened subgraphs; both MIT).
"""

from graphlocal.targets.page.document import page

__all__ = ["page"]
