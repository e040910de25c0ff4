"""The page that explains a selection: one HTML file that needs no network.

In: a finished run, read through `runs` and `selection`. Out: `report.html`.
May import: `selection` and what is beneath it, but no model, gradient or pool pass.
"""

PUBLIC = {
    "exhibits": ("Exhibit", "plotly_json", "write_exhibits"),
    "figures": ("MUTED", "PICKS", "POOL", "SEQUENTIAL", "SIGNED", "colour", "spectrum"),
    "write": ("build_report", "refresh_report", "write_report"),
}
