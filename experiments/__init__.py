"""What turns finished runs into the paper's tables and figures."""
