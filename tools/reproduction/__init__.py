"""The experiments of the EPFL report (Mangalam & Salzmann 2018) as tables of configurations, and what comes of running them."""
