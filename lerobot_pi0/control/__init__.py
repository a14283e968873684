"""Control of a robot: sampling of action chunks, the queue, real-time chunking (RTC) and bounds on actions."""
