"""What a contrastive step over many ranks costs: memory, bytes on the wire and time, by a model that is checked."""
