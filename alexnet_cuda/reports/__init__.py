"""Pictures: of a run (`report.write_report`), of what its network computes, and of an architecture (`drawing.draw`)."""
