"""What people look at: figures, tables, the HTML page."""
