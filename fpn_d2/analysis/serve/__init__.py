"""A detector behind a small page and a JSON API."""
