"""What control adds: sampling, real-time chunking and bounds on actions."""
