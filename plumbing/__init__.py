"""What the scripts need and what has no algorithm in it; buffers.py has the names that they use."""
