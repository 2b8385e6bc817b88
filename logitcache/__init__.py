"""An offline cache of a teacher's next-token distributions."""
