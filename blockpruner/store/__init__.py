"""Files that are whole or absent, facts that are kept, and who wrote them."""
