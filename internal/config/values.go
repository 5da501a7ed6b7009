package config

import (
	"errors"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Duration is a span of time longer than zero, written as Go writes it: "90s",
// "1h30m". There is no unit for days.
type Duration time.Duration

// UnmarshalText reads a duration.
func (d *Duration) UnmarshalText(text []byte) error {
	value, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf(`%s is not a duration with its unit, such as "1h30m"`, quote(string(text)))
	}
	if value <= 0 {
		return fmt.Errorf("%s is not longer than zero", quote(string(text)))
	}
	*d = Duration(value)
	return nil
}

// String returns the duration as Go writes it.
func (d Duration) String() string { return time.Duration(d).String() }

// Or returns d, or the other duration if d was not set.
func (d Duration) Or(other time.Duration) time.Duration {
	if d == 0 {
		return other
	}
	return time.Duration(d)
}

// TrustDomain is a trust domain's bare name, checked by the rules of package
// identity (corpus F5).
type TrustDomain struct{ spiffeid.TrustDomain }

// UnmarshalText reads a trust domain name.
func (t *TrustDomain) UnmarshalText(text []byte) error {
	name, err := identity.ParseTrustDomain(string(text))
	if err != nil {
		return err
	}
	t.TrustDomain = name
	return nil
}

// Plugin is one plugin of a role:
//
//	plugins {
//	    KeyManager "disk" {
//	        plugin_data { keys_path = "/var/lib/plastron/keys.json" }
//	    }
//	}
//
// A role holds them as []Plugin tagged `hcl:"plugins"`, in the order of the file.
type Plugin struct {
	Type string `hcl:",label"`
	Name string `hcl:",label"`
	// Command is the program of an external plugin; empty for a built-in one.
	Command string `hcl:"plugin_cmd"`
	// Args are the arguments of Command.
	Args []string `hcl:"plugin_args"`
	// Checksum is the SHA-256 of Command's program in hexadecimal.
	Checksum string `hcl:"plugin_checksum"`
	// Enabled is false for a plugin that is configured but not used.
	Enabled *bool `hcl:"enabled"`
	// Data is the plugin's own configuration.
	Data Node `hcl:"plugin_data"`
	// DataFile names a file that holds the plugin's own configuration instead.
	DataFile string `hcl:"plugin_data_file"`
}

// Decode stores the plugin's own configuration in dst, a pointer to a struct. It
// reads DataFile if one is named; variables in that file are not expanded.
func (p Plugin) Decode(dst any) error {
	if p.DataFile == "" {
		return p.Data.Decode(dst)
	}
	if p.Data.Present() {
		return p.Data.Fault("plugin_data and plugin_data_file exclude each other")
	}
	return Load(p.DataFile, dst)
}

// Configure is Decode, and dst's own Validate if it has one. Each fault begins with
// the plugin's block.
func (p Plugin) Configure(dst any) error {
	if err := p.Decode(dst); err != nil {
		return err
	}
	v, ok := dst.(interface{ Validate() error })
	if !ok {
		return nil
	}
	faults := []error{v.Validate()}
	if joined, ok := faults[0].(interface{ Unwrap() []error }); ok {
		faults = joined.Unwrap()
	}
	for i, err := range faults {
		if err != nil {
			text, remedy := fault.Words(err)
			faults[i] = fault.New(fault.KindOf(err), fault.ReasonOf(err), "plugins.%s %q: %s", p.Type, p.Name, text).Fix("%s", remedy)
		}
	}
	return errors.Join(faults...)
}

// On reports whether the plugin is to be used.
func (p Plugin) On() bool { return p.Enabled == nil || *p.Enabled }
