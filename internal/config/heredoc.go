package config

import "strings"

// heredoc returns the text of `<<EOF … EOF`. The form `<<-EOF` takes away the
// indentation of the closing line from every line, if all lines have it.
func heredoc(source string) string {
	marker, body, _ := strings.Cut(source, "\n")
	lines := strings.Split(strings.TrimSuffix(body, "\n"), "\n")
	closing := lines[len(lines)-1]
	lines = lines[:len(lines)-1]
	if strings.HasPrefix(marker, "<<-") {
		indent := closing[:len(closing)-len(strings.TrimLeft(closing, " \t"))]
		for _, line := range lines {
			if !strings.HasPrefix(line, indent) {
				indent = ""
			}
		}
		for i := range lines {
			lines[i] = strings.TrimPrefix(lines[i], indent)
		}
	}
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}
