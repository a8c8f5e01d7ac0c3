"""Which operator outputs a checkpointed layer could save: all the best trades of bytes for seconds."""
