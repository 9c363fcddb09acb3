"""Operations: the raw ones (`raw`), their differentiation (`linear_act`), and who runs them (`backends`)."""
