-- the shared basis: energy of the leading mode-1 singular values, and their effective rank
with
    spectra as (
        select
            run, layer, block, R1,
            list_transform(singular_values_1::double[], lambda value: value * value) as energies
        from current
        where len(singular_values_1) > 0
    ),
    totals as (
        select *, list_sum(energies) as total from spectra
    )
select
    run,
    layer,
    block,
    len(energies) as width,
    R1,
    list_sum(energies[1:R1]) / total as energy_of_R1,
    energies[1] / total as energy_of_1,
    list_sum(energies[1:(len(energies) + 15) // 16]) / total as energy_of_sixteenth,
    list_sum(energies[1:(len(energies) + 3) // 4]) / total as energy_of_quarter,
    -- The exponential of the entropy of the energies' shares (Roy and Vetterli, 2007).
    exp(-list_sum(list_transform(
        list_filter(energies, lambda energy: energy > 0),
        lambda energy: energy / total * ln(energy / total)
    ))) as effective_rank
from totals
where total > 0
order by run, layer, block
