package process

import "testing"

func TestHidden(t *testing.T) {
	line := func(options string) string {
		return "1 1 0:1 / / rw - ext4 /dev/x rw,hidepid=2\n22 27 0:21 / /proc rw,relatime shared:1 - proc proc " + options + "\n"
	}
	for text, want := range map[string]bool{
		"": false, line("rw"): false, line("rw,hidepid=0"): false, line("rw,hidepid=off"): false, line("rw,hidepid=2"): true,
		line("rw,hidepid=invisible,gid=5"): true, line("rw,gid=5,hidepid=ptraceable"): true, line("rw,hidepid=2") + line("rw"): false,
	} {
		if hidden([]byte(text)) != want {
			t.Errorf("hidden(%q) = %t", text, !want)
		}
	}
}
