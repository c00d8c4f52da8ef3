"""What layers do, for people to see; and routing that is kept."""
