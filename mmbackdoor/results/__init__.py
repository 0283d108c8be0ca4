"""What a run leaves behind: records, tables, picture grids, the report and the model card."""
