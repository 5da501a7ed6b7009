.PHONY: dev build test test-k8s generate soak

dev: build
	./bin/plastron dev

build:
	CGO_ENABLED=0 go build -trimpath -o bin/plastron ./cmd/plastron

test:
	test/run

test-k8s:
	test/kubernetes/run

generate:
	go -C tools run ./protogen

soak:
	test/soak
