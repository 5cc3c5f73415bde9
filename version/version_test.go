package version

import "testing"

func TestString(t *testing.T) {
	v, c := Version, Commit
	t.Cleanup(func() { Version, Commit = v, c })
	for _, tt := range []struct{ version, commit, want string }{
		{"1.0.0", "0123abc", "1.0.0 (0123abc)"},
		{"1.0.0", "0123abc-dirty", "1.0.0 (0123abc-dirty)"},
	} {
		Version, Commit = tt.version, tt.commit
		if got := String(); got != tt.want {
			t.Errorf("version %q, commit %q: %q, want %q", tt.version, tt.commit, got, tt.want)
		}
	}
}
