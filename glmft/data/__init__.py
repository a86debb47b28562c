"""JSON record -> Conversation -> Sample -> packed Batch."""
