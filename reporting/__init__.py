"""Results for people: pictures, tables and curves."""
