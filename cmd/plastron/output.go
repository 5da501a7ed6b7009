package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// format is the value of -output: text for people, or the API's own messages as
// JSON for programs.
type format string

const (
	pretty format = "pretty"
	asJSON format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "FORMAT" }

func (f *format) Set(s string) error {
	switch format(s) {
	case pretty, asJSON:
		*f = format(s)
		return nil
	}
	if nearest := config.Nearest(s, []string{string(pretty), string(asJSON)}); nearest != "" {
		return fault.New(fault.Invalid, "usage", "did you mean %s?", nearest)
	}
	return fault.New(fault.Invalid, "usage", "there are pretty and json")
}

func outputFlag(flags *pflag.FlagSet) *format {
	f := pretty
	flags.Var(&f, "output", "`FORMAT` of what is printed: pretty or json")
	return &f
}

// printJSON prints messages, one to a line, with the names of the API.
func printJSON(w io.Writer, messages ...proto.Message) error {
	for _, m := range messages {
		text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
		if err != nil {
			return err
		}
		var line bytes.Buffer // protojson varies its spaces on purpose
		if err := json.Compact(&line, text); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(w, line.String()); err != nil {
			return err
		}
	}
	return nil
}
