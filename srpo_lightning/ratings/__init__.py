"""People's judgement of pictures: what is shown, what was answered, and what the answers say."""
