package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxShown is how much of a foreign name an error repeats.
const maxShown = 64

// Nearest returns the candidate that differs from name in the fewest letters, or
// "" if none is near enough to be what was meant. Case does not count.
func Nearest(name string, candidates []string) string {
	if len(name) > maxShown {
		return ""
	}
	best, nearest := 1+max(2, len(name)/3), ""
	for _, candidate := range slices.Sorted(slices.Values(candidates)) {
		if d := distance(strings.ToLower(name), strings.ToLower(candidate), best); d < best {
			best, nearest = d, candidate
		}
	}
	return nearest
}

// suggestion says what may stand in the place of an unknown name.
func suggestion(name string, candidates []string) string {
	if nearest := Nearest(name, candidates); nearest != "" {
		return fmt.Sprintf("did you mean %q?", nearest)
	}
	if len(candidates) == 0 {
		return "no key is known here"
	}
	return "known here: " + strings.Join(slices.Sorted(slices.Values(candidates)), ", ")
}

// distance counts the letters to insert, delete, replace or swap with their
// neighbour to get from a to b. It may stop at limit.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	older, previous, current := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range previous {
		previous[j] = j
	}
	for i := range len(a) {
		current[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			current[j+1] = min(previous[j+1]+1, current[j]+1, previous[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				current[j+1] = min(current[j+1], older[j-1]+1)
			}
		}
		older, previous, current = previous, current, older
	}
	return previous[len(b)]
}

// quote shows a piece of foreign text in an error, cut to a bearable length.
func quote(s string) string {
	if len(s) > maxShown {
		return strconv.Quote(s[:maxShown]) + "..."
	}
	return strconv.Quote(s)
}
